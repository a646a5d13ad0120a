"""Planners: each decides one kind of repair and drafts it; `tiers` joins them into a proposal.

They look only at a source and at its report, and write only into a `planner.repair.draft.Draft`.
"""
