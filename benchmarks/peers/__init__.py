"""One gradient of the same problems by this library and by others, each in a process of its own."""
