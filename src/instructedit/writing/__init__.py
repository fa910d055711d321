"""Instructions written and improved by a language model (Section 4.1), measured with a trial editor."""
