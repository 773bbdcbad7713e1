"""The commands, a file for each room; `graft.cli` lists them. Light: what one calls is imported when it is called."""
