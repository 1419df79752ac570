"""The same networks in other libraries; each module but `__main__` is a separate process."""
