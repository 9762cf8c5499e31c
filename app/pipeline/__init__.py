"""The paper: from slices to what differs. numpy and scipy only; geometry reaches it as a Volume."""
