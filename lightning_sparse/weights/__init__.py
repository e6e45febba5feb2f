"""What is kept of each weight that trains sparse."""
