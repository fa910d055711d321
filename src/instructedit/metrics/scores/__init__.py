"""The metrics, a file each: what is declared here is validated, tested, tabled and drawn."""
