"""Steno's codec and store in other projects' engines; each file needs that project, and nothing here is imported without it."""
