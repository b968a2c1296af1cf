"""A model that does not fit the device, one decoder layer at a time."""
