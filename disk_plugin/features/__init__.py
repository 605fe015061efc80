"""Feature matching weighted by the guide: one module per method, all weighted the same way (``guided``)."""
