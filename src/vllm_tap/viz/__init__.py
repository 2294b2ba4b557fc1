"""Pictures of datasets; matplotlib is loaded when one is drawn."""
