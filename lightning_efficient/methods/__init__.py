"""The functional core: one method, one file; torch only, never Lightning."""
