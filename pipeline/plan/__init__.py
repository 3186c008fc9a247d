"""Plans of the stages that do not prepare themselves yet."""
