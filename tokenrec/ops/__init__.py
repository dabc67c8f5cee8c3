"""Operations on sharded arrays: attention, embedding tables, and shared layers."""
