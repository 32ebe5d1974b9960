"""Where a run computes: its devices, processes and number formats."""
