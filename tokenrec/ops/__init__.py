"""Array operations that know the mesh: attention, embedding tables, and shared layers."""
