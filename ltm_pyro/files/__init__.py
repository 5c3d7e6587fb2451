"""Files that survive crashes, folders that one process uses at a time, and stopping in good order."""
