"""The metrics, one file each; validation, tests, tables and figures use whatever is declared here."""
