class OnlineProbe:
    pass
