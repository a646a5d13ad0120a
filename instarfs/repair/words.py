"""The words for how far a repair may go, for those who load nothing of repairs to take one."""

TIERS = ("leaks", "all", "split", "bitmaps", "snapshots")
"""Those of `planner.repair.plan.RepairTier`."""

PREVIEWS = (*TIERS, "rescue")
"""Those of `planner.repair.plan.PlanTier`: all that can be laid over an image, and not written."""
