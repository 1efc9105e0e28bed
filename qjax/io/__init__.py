"""Reading and writing files: bounded, memory-mapped, atomic."""
