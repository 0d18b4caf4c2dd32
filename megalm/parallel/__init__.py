"""Who holds what and who sends what: groups, collectives, and the layers that are split over the tensor-parallel ranks."""
