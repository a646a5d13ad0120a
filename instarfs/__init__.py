"""The half of instarfs that touches the world: files, locks, threads, the mount, the command line.

What decides anything about an image lives in `planner`; this package opens, locks, schedules and
shows. Arrows point one way: cli, mount, inspector, image, planner.
"""
