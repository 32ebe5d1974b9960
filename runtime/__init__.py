"""Where the recipe runs: devices, processes, checkpoints, teachers, averaged weights and what is printed."""
