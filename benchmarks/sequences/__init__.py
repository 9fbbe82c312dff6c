"""The gradient of one long gated recurrence by this library and by others, each in a process of its own."""
