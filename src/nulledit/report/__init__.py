"""Results to read: tables, figures, the folder and the page of a run."""
