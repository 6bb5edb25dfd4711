"""Files that runs read and write: run folders, the cache, the hub."""
