"""What stands beside a job's ranks on a Slurm cluster: it starts, watches, and restarts them."""
