"""The benchmark suite: tasks, what is measured of a recipe on them, rows that survive, and the report."""
