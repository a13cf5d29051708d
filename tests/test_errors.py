from moempi.errors import MAX_MESSAGE_LENGTH, DataError


def test_a_long_message_keeps_the_file_and_the_reason():
    error = DataError(f"model.h5: {'x' * 10_000}: is damaged")
    assert len(str(error)) <= MAX_MESSAGE_LENGTH
    assert str(error).startswith("model.h5: xxx")
    assert str(error).endswith("xxx: is damaged")
    assert str(DataError("é" * MAX_MESSAGE_LENGTH)) == "é" * MAX_MESSAGE_LENGTH
