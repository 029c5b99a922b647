"""Memory for K and V."""
