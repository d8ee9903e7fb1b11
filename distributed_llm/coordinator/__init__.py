"""The coordinator: keeps the registry of workers, plans the layers, schedules the steps."""
