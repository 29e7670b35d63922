"""The scale study: many small runs, one ledger, one picture."""
