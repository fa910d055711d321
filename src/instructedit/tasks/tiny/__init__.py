"""The embedded default: true facts, a corpus that teaches them, and four datasets in the schemas of the real ones."""
