"""The packed engine: many runs train together on one frozen base."""
