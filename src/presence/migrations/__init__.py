"""The database schema, as alembic revisions. Owns the tables; knows nothing of who reads or writes them."""
