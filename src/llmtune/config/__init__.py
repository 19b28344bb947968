"""The config of a run: its schema, the layers it is read from, and the names other toolkits use."""
