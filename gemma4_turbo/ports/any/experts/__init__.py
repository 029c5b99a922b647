"""Router and experts."""
