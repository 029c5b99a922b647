"""What is the same in every supported release line."""
