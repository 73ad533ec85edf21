"""Other contractions of the same sweeps, for any array library: no file here imports one."""
