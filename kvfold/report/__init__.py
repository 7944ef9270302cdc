"""What people see: tables, plots, HTML."""
