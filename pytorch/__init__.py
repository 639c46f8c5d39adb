"""The Lambda function. On AWS this folder is the import root: its modules import each other by
bare name, and the editable install makes the same names work everywhere else."""
