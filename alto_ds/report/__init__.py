"""A page that shows what runs or a comparison have come to."""
