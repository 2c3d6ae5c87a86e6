"""Everything that touches devices, processes, files and signals; no mathematics."""
