"""What a user can set: frozen, strict, and free of heavy imports."""
