"""Files that survive crashes, folders that one process uses at a time, and stopping cleanly on a signal."""
