"""What the runs mean: budget, selection, targets, comparison, ledger, figures and report. Never torch."""
