"""The tests mirror megachat/: `tests/align/test_dpo.py` tests `megachat/align/dpo.py`."""
