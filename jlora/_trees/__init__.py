"""Trees of parameters: their paths and leaves, tables of them, and what names and sizes say of their axes."""
