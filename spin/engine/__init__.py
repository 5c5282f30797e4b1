"""What a researcher need not read: ranks, checkpoints, files, the optimizer, logging, the command line."""
