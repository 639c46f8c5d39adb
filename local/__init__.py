"""What stands in for AWS on this machine, and the run of the whole walk-through."""
