"""What ``tune`` measures, and how."""
