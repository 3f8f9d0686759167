"""The rooms that the scripts share, by layer: an import points down, never sideways (docs/DESIGN.md)."""
