"""The embedded default: true facts, a corpus that teaches them, and four task datasets in the schemas of the real ones."""
